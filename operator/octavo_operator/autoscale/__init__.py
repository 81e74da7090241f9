"""Pure autoscaling: signals, policy and history in, a number of replicas with its reason out."""
