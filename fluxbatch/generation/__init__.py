"""From prompts to pixels: the model's spec, the compiled programs and the pipeline that runs them."""
