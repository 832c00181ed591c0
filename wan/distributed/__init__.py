"""Room for several GPUs. The command line refuses its flags until then."""
