"""Manifest files of many formats, read as rows."""
