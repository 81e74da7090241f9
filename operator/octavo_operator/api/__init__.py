"""The typed resources of `serving.octavo.dev/v1alpha1`: the one source of the CRDs, of defaults and of validation."""
