"""Containers without an engine: a Dockerfile's steps in a clean root, and processes in namespaces over the result."""
