"""What a run leaves: images, records, resume state, gallery and closing status."""
