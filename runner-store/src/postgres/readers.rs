//! Connections that read, made when first needed.

use std::{
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use runner_core::store::StoreError;
use tokio::sync::Semaphore;

use super::{
    connect::{Conn, Connector, Role},
    error::{Fault, Kind, PostgresError},
};

/// A verb that reads is given up after this. Longer than a statement may take.
const TIMEOUT: Duration = Duration::from_secs(15);

/// A few connections, and who may have one.
#[derive(Debug)]
pub(crate) struct Readers {
    connector: Arc<Connector>,
    permits: Semaphore,
    idle: Mutex<Vec<Arc<Conn>>>,
}

impl Readers {
    pub(crate) fn new(connector: Arc<Connector>, number: usize) -> Self {
        Self { connector, permits: Semaphore::new(number), idle: Mutex::new(Vec::with_capacity(number)) }
    }

    /// Reads. Where the connection breaks, once more on a new one.
    pub(crate) async fn read<T, F, R>(&self, verb: F) -> Result<T, StoreError>
    where
        F: Fn(Arc<Conn>) -> R + Send + Sync,
        R: Future<Output = Result<T, Fault>> + Send,
    {
        let closed = |_| StoreError::Unavailable("it is closed".to_owned());
        let _permit = self.permits.acquire().await.map_err(closed)?;
        match self.once(&verb).await {
            Err(fault) if fault.kind() != Kind::Final => {
                // What broke one has most likely broken the others too.
                self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
                self.once(&verb).await.map_err(StoreError::from)
            }
            result => result.map_err(StoreError::from),
        }
    }

    async fn once<T, F, R>(&self, verb: &F) -> Result<T, Fault>
    where
        F: Fn(Arc<Conn>) -> R + Send + Sync,
        R: Future<Output = Result<T, Fault>> + Send,
    {
        let conn = match self.take() {
            Some(conn) => conn,
            None => match self.connector.connect(Role::Reader).await {
                Ok(conn) => Arc::new(conn),
                Err(PostgresError::Server(StoreError::Unavailable(why))) => return Err(Fault::Away(why)),
                Err(other) => return Err(Fault::Away(other.to_string())),
            },
        };
        match tokio::time::timeout(TIMEOUT, verb(Arc::clone(&conn))).await {
            Ok(Ok(answer)) => {
                self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(conn);
                Ok(answer)
            }
            // The answer to a verb, as that there is no such run, says nothing against the connection.
            Ok(Err(Fault::Answer(error))) => {
                self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(conn);
                Err(Fault::Answer(error))
            }
            // It may be in the middle of a transaction.
            Ok(Err(fault)) => Err(fault),
            Err(_) => {
                conn.abandon();
                Err(Fault::Slow)
            }
        }
    }

    /// An idle connection that is not known to be broken. The caller holds a permit, so there are never more than permits.
    fn take(&self) -> Option<Arc<Conn>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(conn) = idle.pop() {
            if !conn.client.is_closed() {
                return Some(conn);
            }
        }
        None
    }
}
