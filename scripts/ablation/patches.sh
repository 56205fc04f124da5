#!/usr/bin/env bash
exec bash "$(dirname "$0")/../bin/emp" ablate data.num_patches 2 5 10 20 "budget=[epochs,minutes]" "$@"
