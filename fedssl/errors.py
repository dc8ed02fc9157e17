"""The refusals of this package. Each message says what was found, why it is refused and what to do."""


class FedsslError(Exception):
    """Base of every refusal; the command line prints its sentence and exits with code 2."""


class ConfigError(FedsslError):
    """An option, a file or a data set that cannot be used as it is."""


class PrivacyError(FedsslError):
    """A combination for which no privacy claim can be made, or that would send examples away."""


class ProtocolError(FedsslError):
    """A message or a reply that breaks the contract between server and clients."""


class TooFewError(ProtocolError):
    """Fewer clients are left than a round needs: nothing is opened, and the round is skipped."""


class ResumeError(FedsslError):
    """A run directory that cannot be continued."""


class TrainingError(FedsslError):
    """Local training that cannot go on, for example a loss that is not a number."""
