#!/usr/bin/env bash
exec bash "$(dirname "$0")/../bin/emp" ablate optimizer.batch_size 50 100 200 "$@"
