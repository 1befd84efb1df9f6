"""How it is measured: workload -> provider -> samples -> record. Importing this loads no torch."""
