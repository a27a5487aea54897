"""A LightningCLI project that trains its own networks with modules of fedekd."""
