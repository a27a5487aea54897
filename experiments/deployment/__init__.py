"""Models that do-no-harm deploys among the candidates of ProxyEnsemble."""
