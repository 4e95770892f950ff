"""Sites on NVFlare: our round loop in its server job, a supervised worker beside its client process, frames between."""
