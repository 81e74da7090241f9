"""The Kubernetes operator: InferenceService in, healthy and right-sized engine pods out."""
