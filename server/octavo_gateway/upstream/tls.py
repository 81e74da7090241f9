"""TLS towards replicas: whom the gateway trusts, and who it says it is."""

from __future__ import annotations

import ssl

from octavo_gateway.errors import ConfigError


def replica_context(ca: str | None, certificate: str | None, key: str | None) -> ssl.SSLContext:
    """Trusts `ca` alone (None: the system's authorities); shows `certificate` to replicas that ask for one.

    Raises `ConfigError` naming the file that cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"upstream_ca: {ca} holds no PEM certificate ({error})") from error
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"upstream_certificate, upstream_key: {certificate} and {key} are no PEM pair ({error})"
            ) from error
    return context
