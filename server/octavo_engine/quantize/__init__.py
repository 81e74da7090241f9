"""Post-training quantization: from a checkpoint and some text to a smaller standard checkpoint, with a report."""
