"""A Plan as Kubernetes objects, one file per kind. Pure: the same plan gives the same objects, byte for byte."""

from octavo_operator.render.objects import CanaryRender, Object, Owner, render_plan

__all__ = ["CanaryRender", "Object", "Owner", "render_plan"]
