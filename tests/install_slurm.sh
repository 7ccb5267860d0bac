#!/usr/bin/env bash
# The system packages that tests/slurm needs (Debian or Ubuntu, as root). Without them its tests skip.
set -euo pipefail
packages=(munge slurmctld slurmd slurmdbd slurm-client mariadb-server-core mariadb-client-core)
dpkg -s "${packages[@]}" >/dev/null 2>&1 && exit
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
