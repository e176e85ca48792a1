//! How many runs live, as the one writer of a database knows it.

use std::collections::HashMap;

use runner_core::store::LiveLimits;

/// Numbers of live runs, so that accepting needs no count. Changes since the last [`keep`](Self::keep) can be taken back,
/// as the transaction that they belong to can.
#[derive(Debug, Default)]
pub(crate) struct LiveCounts {
    total: u64,
    tenants: HashMap<String, u64>,
    undo: Vec<(String, bool)>,
}

impl LiveCounts {
    /// Takes in what a database has of a tenant.
    pub(crate) fn stored(&mut self, tenant: String, number: i64) {
        let number = u64::try_from(number).unwrap_or(0);
        self.total += number;
        self.tenants.insert(tenant, number);
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Which limit is reached, and its value.
    pub(crate) fn full(&self, tenant: &str, limits: LiveLimits) -> Option<(&'static str, u64)> {
        if self.total >= limits.total {
            Some(("live_runs", limits.total))
        } else if self.of(tenant) >= limits.per_tenant {
            Some(("live_runs_per_tenant", limits.per_tenant))
        } else {
            None
        }
    }

    fn of(&self, tenant: &str) -> u64 {
        self.tenants.get(tenant).copied().unwrap_or(0)
    }

    pub(crate) fn add(&mut self, tenant: &str) {
        self.step(tenant, true);
        self.undo.push((tenant.to_owned(), true));
    }

    pub(crate) fn remove(&mut self, tenant: &str) {
        self.step(tenant, false);
        self.undo.push((tenant.to_owned(), false));
    }

    fn step(&mut self, tenant: &str, up: bool) {
        if up {
            self.total += 1;
            *self.tenants.entry(tenant.to_owned()).or_default() += 1;
        } else {
            self.total = self.total.saturating_sub(1);
            // Tenants without live runs are forgotten: their number is not bounded.
            if let Some(count) = self.tenants.get_mut(tenant) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.tenants.remove(tenant);
                }
            }
        }
    }

    pub(crate) fn mark(&self) -> usize {
        self.undo.len()
    }

    pub(crate) fn take_back(&mut self, mark: usize) {
        for (tenant, up) in self.undo.split_off(mark).into_iter().rev() {
            self.step(&tenant, !up);
        }
    }

    pub(crate) fn keep(&mut self) {
        self.undo.clear();
    }
}
