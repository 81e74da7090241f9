"""Does the gateway's memory stay flat? Hundreds of thousands of requests through tenants, limits, routing and ledger.

Rounds of whole and streamed answers from a mock replica, every prompt another one. After each round the resident memory
is read; the slope is fitted over the second half, when caches and the prefix index (here bounded to 20,000 blocks, so
that it fills early) are warm.

    python benchmarks/gateway_soak.py [--requests 1000000] [--rate 500] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

from gateway import measure, start_octavo, start_replica
from gateway_load import KEY, Load

from octavo_gateway.tenancy import hash_key
from octavo_gateway.tenancy.keys import format_hash

CONNECTIONS = 64
WHOLE, STREAMED = 15_000, 5_000  # per round
TENANT = """
apiVersion: serving.octavo.dev/v1alpha1
kind: InferenceTenant
metadata: {{name: soak}}
spec: {{keySecretRefs: [{{name: keys}}], limits: {{tokensPerMinute: 1000000000}}}}
---
apiVersion: v1
kind: Secret
metadata: {{name: keys}}
stringData: {{key: "{hash}"}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second at most; 0: as many as it takes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    replica = start_replica()
    samples: list[tuple[int, float]] = []
    errors, sent, began = 0, 0, time.time()
    interval_s = CONNECTIONS / options.rate if options.rate else 0.0
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}\n{'requests':>9} {'RSS':>9} {'per second':>11}")
    with tempfile.TemporaryDirectory() as folder:
        tenants = Path(folder) / "tenants.yaml"
        tenants.write_text(TENANT.format(hash=format_hash(hash_key(KEY))))
        os.environ["OCTAVO_GATEWAY_PREFIX_INDEX_BLOCKS"] = "20000"
        gateway = start_octavo(Path(folder), "--tenants", str(tenants), "--ledger", f"{folder}/ledger")
        try:
            while sent < options.requests:
                for events, count in ((0, WHOLE), (1, STREAMED)):
                    load = Load(
                        gateway.port,
                        CONNECTIONS,
                        count // CONNECTIONS,
                        events=events,
                        interval_s=interval_s,
                        unique=True,
                    )
                    result = measure(load)
                    errors += int(result["errors"])
                    sent += int(result["requests"]) + CONNECTIONS
                samples.append((sent, gateway.memory_mib))
                print(f"{sent:9,} {gateway.memory_mib:5.1f} MiB {sent / (time.time() - began):11.0f}", flush=True)
        finally:
            gateway.process.terminate()
            gateway.process.wait()
            replica.kill()
    late = samples[len(samples) // 2 :]
    slope = statistics.linear_regression([n for n, _ in late], [mib for _, mib in late]).slope * 100_000
    print(f"slope over the second half: {slope:+.2f} MiB per 100,000 requests; {errors} errors in {sent:,} requests")
    if options.json:
        document = {
            "date": time.strftime("%Y-%m-%d"),
            "errors": errors,
            "slope_mib_per_100k": slope,
            "samples": samples,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
