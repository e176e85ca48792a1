//! `kill -9` of the service at every named crash point of a run's life, and at other bad moments, on a cluster.

runner_tests::crash_suite!(runner_tests::scene::On::K8sJob);
