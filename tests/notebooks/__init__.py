"""The notebooks of `examples/`: their structure, and whether they still say what is true."""
