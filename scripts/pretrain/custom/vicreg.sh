#!/usr/bin/env bash
exec bash "$(dirname "$0")/../../bin/emp" pretrain custom/vicreg "$@"
