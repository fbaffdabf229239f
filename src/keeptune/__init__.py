"""keeptune: fine-tune language models on one task after another and keep what they knew."""
