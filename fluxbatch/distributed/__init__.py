"""Devices and processes: mesh, process group, replica identity, chips."""
