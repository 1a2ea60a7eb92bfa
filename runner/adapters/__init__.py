"""LoRA and DoRA adapters in PEFT's format."""
