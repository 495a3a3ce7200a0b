//! What is wrong with the host, and how to mend it.
