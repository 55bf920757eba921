import logging

# diffusers imports bitsandbytes where it is installed, which on some CPUs asks for a package that 4-bit weights need.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
