"""bitsandbytes bases: what the package promises of them, checked one by one."""
