"""Versioned engine profiles (TOML)."""
