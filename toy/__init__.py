import libs  # noqa: F401 - before diffusers, which it keeps quiet
