"""The Deep Learning Tuning Playbook as code for JAX and Optax."""

__version__ = "0.1.0"
