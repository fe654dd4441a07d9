"""The operators' console: pages over the very functions of `/v1`, for who is logged in with a caller key."""
