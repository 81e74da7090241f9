"""From logits to tokens: logit processors, filters, counter-based noise and log-probabilities."""
