"""Where models and replicas come from: a static file, the local supervisor, or the Kubernetes API."""

from octavo_gateway.discovery.kube_api import ApiServer
from octavo_gateway.discovery.kubernetes import KubernetesDiscovery
from octavo_gateway.discovery.local import LocalDiscovery
from octavo_gateway.discovery.static import StaticDiscovery, StaticFile, load_static

__all__ = ["ApiServer", "KubernetesDiscovery", "LocalDiscovery", "StaticDiscovery", "StaticFile", "load_static"]
