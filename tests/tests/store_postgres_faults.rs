//! What goes wrong around the state store on PostgreSQL: the server goes away, a connection breaks at the worst moment, a second service,
//! another version of the schema, a wrong password.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering},
    },
    time::Duration,
};

use runner_core::{
    state::{
        Position,
        RunState::{Preparing, Running},
    },
    store::{Accepted, Store, StoreError, Transitioned},
    task::{TaskKind, spawn},
};
use runner_store::{
    PostgresError, PostgresOptions, PostgresStore,
    postgres::{Migrated, migrate},
};
use runner_tests::{
    postgres::{CAREFUL_USER, PASSWORD, Postgres, USER, skip, url},
    service::eventually,
    store::{block_on, kit},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// The server of this process, or a skip that is seen.
fn server(test: &str) -> Option<&'static Postgres> {
    Postgres::shared().map_err(|why| skip(test, why)).ok()
}

async fn migrated(server: &Postgres) -> String {
    let schema = server.schema().await;
    migrate(&server.options(&schema)).await.unwrap();
    schema
}

async fn open(options: &PostgresOptions) -> PostgresStore {
    PostgresStore::open(options).await.unwrap()
}

/// What a proxy does when a client commits. Once; then it passes everything again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum At {
    Nothing,
    /// Cuts before the server has seen it.
    Before,
    /// Cuts after the server has answered, without the answer.
    After,
}

/// Stands before a server.
struct Proxy {
    address: SocketAddr,
    at_commit: Arc<AtomicU8>,
    closed: Arc<AtomicBool>,
    cuts: Arc<AtomicU32>,
    pipes: Arc<Mutex<Vec<tokio::task::JoinHandle<Option<()>>>>>,
}

impl Proxy {
    async fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self {
            address: listener.local_addr().unwrap(),
            at_commit: Arc::default(),
            closed: Arc::default(),
            cuts: Arc::default(),
            pipes: Arc::default(),
        };
        let (at, closed, cuts, pipes) = (
            Arc::clone(&proxy.at_commit),
            Arc::clone(&proxy.closed),
            Arc::clone(&proxy.cuts),
            Arc::clone(&proxy.pipes),
        );
        spawn(TaskKind::Helper, "proxy", async move {
            while let Ok((client, _)) = listener.accept().await {
                if closed.load(Ordering::SeqCst) {
                    continue;
                }
                let (at, cuts) = (Arc::clone(&at), Arc::clone(&cuts));
                let pipe = spawn(TaskKind::Helper, "pipe", async move {
                    pipe(client, server, &at, &cuts).await;
                });
                pipes.lock().unwrap_or_else(PoisonError::into_inner).push(pipe);
            }
        });
        proxy
    }

    fn cut(&self, at: At) {
        self.at_commit.store(at as u8, Ordering::SeqCst);
    }

    /// Ends every connection; lets none in any more, or again.
    fn close(&self, closed: bool) {
        self.closed.store(closed, Ordering::SeqCst);
        for pipe in self.pipes.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            pipe.abort();
        }
    }
}

async fn pipe(client: TcpStream, server: SocketAddr, at: &AtomicU8, cuts: &AtomicU32) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let (mut request, mut answer) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        tokio::select! {
            read = from_client.read(&mut request) => {
                let Ok(read @ 1..) = read else { return };
                let request = &request[..read];
                let mut cut = At::Nothing as u8;
                if request.windows(7).any(|window| window == b"COMMIT\0") {
                    cut = at.swap(At::Nothing as u8, Ordering::SeqCst);
                }
                if cut != At::Nothing as u8 {
                    cuts.fetch_add(1, Ordering::SeqCst);
                }
                if cut == At::Before as u8 || to_server.write_all(request).await.is_err() {
                    return;
                }
                if cut == At::After as u8 {
                    let _ = from_server.read(&mut answer).await;
                    return;
                }
            }
            read = from_server.read(&mut answer) => {
                let Ok(read @ 1..) = read else { return };
                if to_client.write_all(&answer[..read]).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[test]
fn a_commit_whose_answer_is_lost_is_told_apart_from_one_that_never_happened() {
    let Some(server) = server("a_commit_whose_answer_is_lost") else { return };
    block_on(async {
        let schema = migrated(server).await;
        let proxy = Proxy::before(server.address()).await;
        let store = open(&server.options_at(proxy.address, &schema)).await;
        for (n, at) in [(1, At::After), (2, At::Before), (3, At::After), (4, At::Before)] {
            proxy.cut(at);
            // Not `Existing`, though the first time may have stored it.
            kit::create(&store, kit::run(n)).await;
            proxy.cut(at);
            // Not a conflict with itself.
            let begin = kit::step(kit::id(n), Position::START, kit::place(Preparing, 1));
            let answer = store.transition(begin).await.unwrap();
            assert_eq!(answer, Transitioned::Applied { last_event: 2 }, "{at:?}");
            kit::assert_consecutive(&store, kit::id(n)).await;
        }
        assert_eq!(proxy.cuts.load(Ordering::SeqCst), 8);
        assert_eq!(store.live_count().await.unwrap(), 4);
        assert_eq!(store.live().await.unwrap().runs.len(), 4);
    });
}

#[test]
fn connections_that_break_at_any_time_are_replaced() {
    let Some(server) = server("connections_that_break_at_any_time") else { return };
    block_on(async {
        let schema = migrated(server).await;
        let proxy = Proxy::before(server.address()).await;
        let store: Arc<dyn Store> = Arc::new(open(&server.options_at(proxy.address, &schema)).await);
        let done = Arc::new(AtomicU32::new(0));
        let tasks: Vec<_> = (0..4u128)
            .map(|task| {
                let (store, done) = (Arc::clone(&store), Arc::clone(&done));
                spawn(TaskKind::Helper, "work", async move {
                    for n in 0..50 {
                        let id = task * 1000 + n;
                        kit::create(&*store, kit::run(id)).await;
                        done.fetch_add(1, Ordering::SeqCst);
                        kit::lead(&*store, kit::id(id), &[(Preparing, 1), (Running, 1)]).await;
                    }
                })
            })
            .collect();
        for cut in 1..=5 {
            eventually("more runs", async || (done.load(Ordering::SeqCst) >= cut * 30).then_some(())).await;
            proxy.close(false);
        }
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        let live = store.live().await.unwrap();
        assert_eq!((live.runs.len(), live.quarantined.len()), (200, 0));
        assert!(live.runs.iter().all(|run| run.position == kit::place(Running, 1) && run.last_event == 3));
        assert_eq!(store.live_count().await.unwrap(), 200);
    });
}

#[test]
fn a_server_that_is_restarted_or_killed_loses_nothing_that_was_answered() {
    let Some(server) = Postgres::start() else {
        return skip("a_server_that_is_restarted_or_killed", "PostgreSQL is not installed");
    };
    let server = Arc::new(server);
    block_on(async {
        let schema = migrated(&server).await;
        let store: Arc<dyn Store> = Arc::new(open(&server.options(&schema)).await);
        let (answered, refused) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let ended = Arc::new(AtomicBool::new(false));
        let tasks: Vec<_> = (0..4u128)
            .map(|task| {
                let store = Arc::clone(&store);
                let (answered, refused, ended) =
                    (Arc::clone(&answered), Arc::clone(&refused), Arc::clone(&ended));
                spawn(TaskKind::Helper, "work", async move {
                    let mut created = Vec::new();
                    for n in 0.. {
                        let id = task * 100_000 + n;
                        match store.accept(kit::run(id), kit::NO_LIMITS).await {
                            Ok(Accepted::Created(run)) => created.push(run.id),
                            Ok(other) => panic!("{other:?}"),
                            Err(StoreError::Unavailable(_)) => {
                                refused.fetch_add(1, Ordering::SeqCst);
                            }
                            Err(other) => panic!("{other:?}"),
                        }
                        answered.fetch_add(1, Ordering::SeqCst);
                        match store.get(kit::id(id)).await {
                            Ok(_) | Err(StoreError::Unavailable(_)) => {}
                            Err(other) => panic!("{other:?}"),
                        }
                        if ended.load(Ordering::SeqCst) {
                            break;
                        }
                    }
                    created
                })
            })
            .collect();
        for cleanly in [true, false] {
            let seen = answered.load(Ordering::SeqCst);
            eventually("work", async || (answered.load(Ordering::SeqCst) > seen + 50).then_some(())).await;
            let server = Arc::clone(&server);
            let restart = move || {
                server.stop(cleanly);
                server.go();
            };
            tokio::task::spawn_blocking(restart).await.unwrap();
        }
        let seen = answered.load(Ordering::SeqCst);
        eventually("work", async || (answered.load(Ordering::SeqCst) > seen + 50).then_some(())).await;
        ended.store(true, Ordering::SeqCst);
        let mut created = Vec::new();
        for task in tasks {
            created.extend(task.await.unwrap().unwrap());
        }
        for id in &created {
            kit::assert_consecutive(&*store, *id).await;
        }
        let live = store.live().await.unwrap();
        assert_eq!(live.quarantined, []);
        // What was refused may be there or not; what was answered is, and the count knows.
        assert!(live.runs.len() >= created.len());
        assert!(live.runs.len() <= created.len() + refused.load(Ordering::SeqCst) as usize);
        assert_eq!(store.live_count().await.unwrap(), live.runs.len() as u64);
    });
}

#[test]
fn without_a_server_verbs_are_unavailable_in_bounded_time_and_work_again_after() {
    let Some(server) = server("without_a_server") else { return };
    block_on(async {
        let schema = migrated(server).await;
        let proxy = Proxy::before(server.address()).await;
        let store = open(&server.options_at(proxy.address, &schema)).await;
        kit::create(&store, kit::run(1)).await;
        proxy.close(true);
        let refused = store.probe().await.unwrap_err();
        assert!(matches!(refused, StoreError::Unavailable(_)), "{refused:?}");
        // It is known by now: nobody waits for it again.
        let at_once = tokio::time::timeout(Duration::from_secs(5), async {
            for n in 2..20 {
                let refused = store.accept(kit::run(n), kit::NO_LIMITS).await.unwrap_err();
                assert!(matches!(refused, StoreError::Unavailable(_)), "{refused:?}");
                let refused = store.get(kit::id(1)).await.unwrap_err();
                assert!(matches!(refused, StoreError::Unavailable(_)), "{refused:?}");
            }
        });
        at_once.await.expect("an answer at once");
        proxy.close(false);
        eventually("the server is seen", async || store.probe().await.ok()).await;
        kit::create(&store, kit::run(2)).await;
        assert_eq!(store.live_count().await.unwrap(), 2);
    });
}

#[test]
fn a_deadlock_with_a_stranger_costs_time_and_nothing_else() {
    let Some(server) = server("a_deadlock_with_a_stranger") else { return };
    block_on(async {
        let schema = migrated(server).await;
        let store = Arc::new(open(&server.options(&schema)).await);
        kit::create(&*store, kit::run(1)).await;
        let stranger = server.admin().await;
        stranger.batch_execute(&format!("SET search_path = {schema}")).await.unwrap();
        // Ours has the row of `writer` and wants the run; the stranger has the run and wants the row of `writer`.
        stranger.batch_execute("BEGIN; UPDATE runs SET backend = backend").await.unwrap();
        let ours = {
            let store = Arc::clone(&store);
            let begin = kit::step(kit::id(1), Position::START, kit::place(Preparing, 1));
            spawn(TaskKind::Helper, "ours", async move { store.transition(begin).await })
        };
        let watcher = server.admin().await;
        let waits = format!(
            "SELECT 1 FROM pg_stat_activity a JOIN pg_locks l USING (pid) WHERE a.application_name = 'runner' \
             AND a.wait_event_type = 'Lock' AND l.relation = '{schema}.writer'::regclass"
        );
        eventually("ours waits", async || watcher.query_opt(&waits, &[]).await.unwrap().map(drop)).await;
        // The server gives up whoever finds the deadlock: mostly ours, which began to wait before.
        let _ = stranger.batch_execute("UPDATE writer SET holder = holder").await;
        stranger.batch_execute("ROLLBACK").await.unwrap();
        let ours = ours.await.unwrap().unwrap().unwrap();
        assert_eq!(ours, Transitioned::Applied { last_event: 2 });
        kit::assert_consecutive(&*store, kit::id(1)).await;
    });
}

#[test]
fn a_row_that_stays_locked_is_unavailable_and_later_free() {
    let Some(server) = server("a_row_that_stays_locked") else { return };
    block_on(async {
        let schema = migrated(server).await;
        let mut options = server.options(&schema);
        options.url = options.url.replace("search_path", "lock_timeout%3D300ms%20-csearch_path");
        let store = open(&options).await;
        kit::create(&store, kit::run(1)).await;
        let stranger = server.admin().await;
        stranger.batch_execute(&format!("BEGIN; LOCK TABLE {schema}.timers")).await.unwrap();
        let begin = || kit::step(kit::id(1), Position::START, kit::place(Preparing, 1));
        let refused = store.transition(begin()).await.unwrap_err();
        assert!(matches!(refused, StoreError::Unavailable(_)), "{refused:?}");
        // The rest goes on.
        kit::create(&store, kit::run(2)).await;
        stranger.batch_execute("ROLLBACK").await.unwrap();
        kit::apply(&store, begin()).await;
    });
}

#[test]
fn a_second_service_is_refused_and_told_who_has_the_schema() {
    let Some(server) = server("a_second_service") else { return };
    block_on(async {
        let schema = migrated(server).await;
        let first = open(&server.options(&schema)).await;
        let impatient = PostgresOptions { wait_for_other: Duration::ZERO, ..server.options(&schema) };
        let refused = PostgresStore::open(&impatient).await.unwrap_err();
        let PostgresError::Held { who } = &refused else { panic!("{refused:?}") };
        assert!(who.contains("runner") && who.contains("127.0.0.1"), "{who}");
        // Another schema of the same database is another store.
        let other = migrated(server).await;
        kit::create(&open(&server.options(&other)).await, kit::run(1)).await;
        kit::create(&first, kit::run(1)).await;
        drop(first);
        let second = open(&server.options(&schema)).await;
        kit::must_get(&second, kit::id(1)).await;
    });
}

#[test]
fn a_service_that_was_replaced_stores_nothing_any_more() {
    let Some(server) = server("a_service_that_was_replaced") else { return };
    block_on(async {
        let schema = migrated(server).await;
        let proxy = Proxy::before(server.address()).await;
        let first = open(&server.options_at(proxy.address, &schema)).await;
        kit::create(&first, kit::run(1)).await;
        proxy.close(true);
        let second = open(&server.options(&schema)).await;
        drop(second);
        proxy.close(false);
        // Its lock would be free again; that it is not its own any more is in the database.
        for _ in 0..2 {
            let refused = first.accept(kit::run(2), kit::NO_LIMITS).await.unwrap_err();
            let StoreError::Unavailable(why) = &refused else { panic!("{refused:?}") };
            assert!(why.contains("another service"), "{why}");
        }
        let third = open(&server.options(&schema)).await;
        assert_eq!(third.get(kit::id(2)).await.unwrap(), None);
        assert_eq!(third.live_count().await.unwrap(), 1);
    });
}

#[test]
fn of_several_migrations_at_once_one_does_it_and_the_others_find_it_done() {
    let Some(server) = server("of_several_migrations_at_once") else { return };
    block_on(async {
        let schema = server.schema().await;
        let options = server.options(&schema);
        let unmade = PostgresStore::open(&options).await.unwrap_err();
        assert!(matches!(unmade, PostgresError::OlderSchema { found: 0, needed: 1 }), "{unmade:?}");
        assert!(unmade.to_string().contains("runner migrate"), "{unmade}");
        let all = futures::future::join_all((0..8).map(|_| migrate(&options))).await;
        let all: Vec<Migrated> = all.into_iter().map(Result::unwrap).collect();
        assert_eq!(all.iter().filter(|done| **done == Migrated { from: 0, to: 1 }).count(), 1);
        assert_eq!(all.iter().filter(|done| **done == Migrated { from: 1, to: 1 }).count(), 7);
        kit::create(&open(&options).await, kit::run(1)).await;

        let admin = server.admin().await;
        admin.batch_execute(&format!("UPDATE {schema}.runner_schema SET version = 99")).await.unwrap();
        let newer = PostgresStore::open(&options).await.unwrap_err();
        assert!(matches!(newer, PostgresError::NewerSchema { found: 99, known: 1 }), "{newer:?}");
        let newer = migrate(&options).await.unwrap_err();
        assert!(matches!(newer, PostgresError::NewerSchema { found: 99, known: 1 }), "{newer:?}");
    });
}

#[test]
fn a_migration_that_fails_leaves_nothing_behind() {
    let Some(server) = server("a_migration_that_fails") else { return };
    block_on(async {
        let schema = server.schema().await;
        let admin = server.admin().await;
        // The last table is in the way.
        admin.batch_execute(&format!("CREATE TABLE {schema}.writer (x INTEGER)")).await.unwrap();
        let failed = migrate(&server.options(&schema)).await.unwrap_err();
        assert!(matches!(failed, PostgresError::Migration { to: 1, .. }), "{failed:?}");
        let tables = "SELECT count(*) FROM pg_tables WHERE schemaname = $1";
        let left: i64 = admin.query_one(tables, &[&schema]).await.unwrap().get(0);
        assert_eq!(left, 1);
        admin.batch_execute(&format!("DROP TABLE {schema}.writer")).await.unwrap();
        assert_eq!(migrate(&server.options(&schema)).await.unwrap(), Migrated { from: 0, to: 1 });
    });
}

#[test]
fn the_password_is_read_from_its_file_and_never_said() {
    let Some(server) = server("the_password_is_read") else { return };
    block_on(async {
        let schema = migrated(server).await;
        let sql = format!(
            "CREATE ROLE {CAREFUL_USER} LOGIN PASSWORD '{}'; GRANT USAGE ON SCHEMA {schema} TO {CAREFUL_USER}; \
             GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {CAREFUL_USER}",
            PASSWORD.replace('\'', "''")
        );
        server.admin().await.batch_execute(&sql).await.unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let options = PostgresOptions {
            password_file: Some(file.path().to_owned()),
            ..PostgresOptions::new(url(CAREFUL_USER, server.address(), &schema))
        };
        std::fs::write(file.path(), "not the one").unwrap();
        let refused = PostgresStore::open(&options).await.unwrap_err();
        assert!(matches!(refused, PostgresError::Server(StoreError::Unavailable(_))), "{refused:?}");
        assert!(!format!("{refused:?} {refused}").contains("not the one"));
        std::fs::write(file.path(), format!("{PASSWORD}\n")).unwrap();
        let store = open(&options).await;
        kit::create(&store, kit::run(1)).await;
        assert!(!format!("{store:?} {options:?}").contains("not to be seen"));
        let gone = PostgresOptions { password_file: Some("/nowhere/password".into()), ..options };
        let refused = PostgresStore::open(&gone).await.unwrap_err();
        assert!(matches!(refused, PostgresError::Password { .. }), "{refused:?}");
    });
}

#[test]
fn tls_is_to_the_server_that_its_certificate_names_or_not_at_all() {
    let Some(server) = server("tls_is_to_the_server") else { return };
    block_on(async {
        let schema = migrated(server).await;
        let port = server.address().port();
        let at = |host: &str| PostgresOptions {
            authorities: Some(server.authority()),
            ..PostgresOptions::new(format!(
                "postgres://{USER}@{host}:{port}/postgres?sslmode=verify-full&options=-csearch_path%3D{schema}"
            ))
        };
        let store = open(&at("127.0.0.1")).await;
        kit::create(&store, kit::run(1)).await;
        let admin = server.admin().await;
        let sessions = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE ssl AND application_name = 'runner'";
        assert_eq!(admin.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0), 1);
        drop(store);
        drop(open(&at("localhost")).await);
        // The same server by a name that is not in its certificate, and one whose authority is not trusted.
        let strange = PostgresOptions { authorities: None, ..at("127.0.0.1") };
        for options in [at("127.0.0.2"), strange] {
            let refused = PostgresStore::open(&options).await.unwrap_err();
            assert!(matches!(refused, PostgresError::Server(StoreError::Unavailable(_))), "{refused:?}");
        }
    });
}
