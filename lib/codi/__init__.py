"""Study 4: latent chains of thought, what they attend to and what they store."""
