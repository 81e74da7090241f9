"""A Plan as Kubernetes objects, one file per kind. Pure: the same plan gives the same objects, byte for byte."""

from octavo_operator.render.objects import Object, Owner, render_plan

__all__ = ["Object", "Owner", "render_plan"]
