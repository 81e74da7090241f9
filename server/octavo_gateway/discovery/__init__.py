"""Where models and replicas come from: a static file, the local supervisor, or the Kubernetes API."""

from octavo_gateway.discovery.local import LocalDiscovery
from octavo_gateway.discovery.static import StaticDiscovery, load_static

__all__ = ["LocalDiscovery", "StaticDiscovery", "load_static"]
