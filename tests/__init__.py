"""Equalities on tiny real inputs."""
