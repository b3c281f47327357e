# To be sourced: sets `cache` to the directory of what is kept over checkouts.
#
# Environment: BAI_AGENT_CACHE (default ~/.cache/bai-agent)
cache=${BAI_AGENT_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/bai-agent}
