"""A procedural contrast-enhanced cardiac CT with exact labels."""
