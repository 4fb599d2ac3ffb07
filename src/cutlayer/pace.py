"""Temporary."""
def paces(config, parts):
    return {n: None for n in parts.clients}, None
