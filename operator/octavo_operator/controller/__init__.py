"""The thin shell around the pure core: kopf handlers, the Kubernetes client, watches, scraping, leader election."""
