"""Adapters as files and as a set: checked, loaded over, combined, merged safely."""
