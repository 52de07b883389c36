//! Keeps an engine and a data plane in step: carries out outputs in the engine's order, and before any input that may
//! depose the OVM stops the plane and hands the engine everything that it passed (rules 1 and 2).
//!
//! The daemon, the simulator and the fuzzers implement [`Driven`] and call the functions here, so that all of them play the
//! same protocol between engine and plane:
//!
//! 1. hand the engine an input, then [`drain`];
//! 2. what may depose the OVM goes through [`cut_over`] instead;
//! 3. when no input is left, [`settle`].

use understudy_protocol::{
    Command, Evidence, Input, Instant, OperatorError, Output, Rule, ServerId, Service,
};

/// Most packets and handovers that one call of [`drain`] carries out, so that other work gets its turn.
const BURST: u32 = 256;

/// An engine, or a wrapper around one, such as the daemon's, which keeps a journal of its inputs.
pub trait Engine {
    /// See [`Service::handle`].
    fn handle(&mut self, now: Instant, input: Input<'_>) -> Result<(), OperatorError>;

    /// Hands over an input other than [`Input::Command`], which the engine never refuses.
    fn tell(&mut self, now: Instant, input: Input<'_>) {
        let result = self.handle(now, input);
        debug_assert_eq!(result, Ok(()), "only a command can be refused");
    }

    /// Hands over an operator's command, which the engine may refuse; see [`Input::Command`].
    fn command(&mut self, now: Instant, command: Command) -> Result<(), OperatorError> {
        self.handle(now, Input::Command(command))
    }

    /// See [`Service::poll`].
    fn poll(&mut self, now: Instant) -> Option<Output>;

    /// The driver polled the engine `count` times and carried out the outputs.
    fn polled(&mut self, _now: Instant, _count: u32) {}

    /// A cutover begins (`urgent`) or is over: meanwhile nothing else should take time.
    fn set_urgent(&mut self, _urgent: bool) {}

    /// The engine itself, to read its state.
    fn service(&self) -> &Service;
}

impl Engine for Service {
    fn handle(&mut self, now: Instant, input: Input<'_>) -> Result<(), OperatorError> {
        self.handle(now, input)
    }

    fn poll(&mut self, now: Instant) -> Option<Output> {
        self.poll(now)
    }

    fn service(&self) -> &Service {
        self
    }
}

/// What the engine found against its OVM while the plane was passing by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// The server that the evidence is against.
    pub accused: ServerId,
    /// The evidence.
    pub evidence: Evidence,
}

/// An engine together with everything that its outputs act on: a data plane, domains, and listeners for events.
pub trait Driven {
    /// The engine.
    type Engine: Engine;

    /// The engine.
    fn engine(&mut self) -> &mut Self::Engine;

    /// The place where the driver keeps the suspicion on which [`settle`] acts.
    fn suspicion(&mut self) -> &mut Option<Suspicion>;

    /// Whether outputs can be carried out now. If not, they wait.
    fn is_ready(&self) -> bool {
        true
    }

    /// Carries out any output except [`Output::StopPlane`], which the driver itself carries out.
    fn carry_out(&mut self, output: Output);

    /// Makes the plane pass nothing by itself and take no server for the OVM, until [`Output::Cutover`] or
    /// [`Driven::resume`]. `false` if the plane never passes anything by itself, or is stopped already.
    fn stop(&mut self) -> bool;

    /// Hands the engine the next packet, passed or not, that arrived before the plane was stopped; `false` if none is
    /// left.
    fn hear_rest(&mut self, now: Instant) -> bool;

    /// Ends [`Driven::stop`]: if no cutover has ended it already, the plane takes this server for the OVM again.
    fn resume(&mut self, ovm: Option<ServerId>);

    /// Whether the engine has received everything that the plane had for it.
    fn is_idle(&self) -> bool;
}

/// Carries out the engine's outputs; `true` if more wait.
pub fn drain(driven: &mut impl Driven, now: Instant) -> bool {
    if !driven.is_ready() {
        return false;
    }
    let (mut count, mut left) = (0, BURST);
    while left > 0 {
        count += 1;
        match driven.engine().poll(now) {
            Some(Output::StopPlane { accused, evidence }) => {
                *driven.suspicion() = Some(Suspicion { accused, evidence });
            }
            Some(output) => {
                if matches!(output, Output::Transmit(_) | Output::Rule(Rule::HandOver(_))) {
                    left -= 1;
                }
                driven.carry_out(output);
            }
            None => break,
        }
    }
    driven.engine().polled(now, count);
    left == 0
}

/// Stops the plane, hands the engine everything that the plane passed, and then the input that may depose the OVM, if
/// any. Before a cutover the engine must know of every byte that clients have (rule 2).
pub fn cut_over(
    driven: &mut impl Driven,
    now: Instant,
    input: Option<Input<'_>>,
) -> Result<(), OperatorError> {
    driven.engine().set_urgent(true);
    if driven.stop() {
        while driven.hear_rest(now) {
            drain(driven, now);
        }
        driven.engine().tell(now, Input::PlaneStopped);
    }
    let result = input.map_or(Ok(()), |input| driven.engine().handle(now, input));
    drain(driven, now);
    let ovm = driven.engine().service().ovm();
    driven.resume(ovm);
    driven.engine().set_urgent(false);
    result
}

/// Acts on a suspicion of the engine, then lets the plane pass conversations. Call it once every input at hand was
/// handed over.
pub fn settle(driven: &mut impl Driven, now: Instant) {
    if let Some(Suspicion { accused, evidence }) = driven.suspicion().take() {
        let result = cut_over(driven, now, Some(Input::Confirmed { accused, evidence }));
        debug_assert_eq!(result, Ok(()), "only a command can be refused");
        // A suspicion that came up meanwhile concerns an OVM that has been judged already.
        *driven.suspicion() = None;
    }
    if driven.is_idle() && driven.engine().service().wants_to_hand_over() {
        driven.engine().tell(now, Input::PlaneIdle);
        drain(driven, now);
    }
}
