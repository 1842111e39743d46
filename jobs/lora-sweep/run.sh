#!/bin/sh
# flux-mini's two LoRAs: adapter × scale as a grid of jobs, then several mixes as rows of one job.
# The weights are loaded once; from job to job only what the adapters touch is streamed anew.
# More settings go on the command line: jobs/lora-sweep/run.sh output_dir=gs://bucket/somewhere
set -e
here=$(dirname "$0")
python -m fluxbatch.run -m model=flux-mini manifest="$here/prompts.jsonl" run_name=lora-sweep \
    'lora_config.lora_model_name_or_path=[flux-mini]' 'lora_config.adapter_name=[style]' 'lora_config.from_pt=[true]' \
    'lora_config.weight_name=[loras/pixel-art.safetensors],[loras/outline.safetensors]' \
    'lora_config.scale=[0.0],[0.5],[1.0],[1.5]' "$@"
python -m fluxbatch.run model=flux-mini manifest="$here/rows.jsonl" run_name=lora-rows 'lora=[pixel-art,outline]' per_device_batch_size=5 "$@"
