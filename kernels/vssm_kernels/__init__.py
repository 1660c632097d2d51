"""The selective scan of vision state-space models: one op, two public faces, several implementations."""
