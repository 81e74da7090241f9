"""Reading checkpoints: GGUF and safetensors files, mapped into memory and checked before use."""
