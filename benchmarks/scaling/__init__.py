"""One start over several processes, beside one."""
