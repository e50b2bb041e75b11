"""A disk that is full, for programs that tests run.

As it does, a limit lets files grow to a size and then fails with an error number.
"""

LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""
