"""Study 3: directions of refusal, behaviour without them, judges and requests."""
