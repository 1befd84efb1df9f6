"""What is compared: workloads, their inputs, and the providers that can run them. Importing this loads no torch."""
